"""Other libraries' adapter files for this plugin's methods: one module for each library and family of methods."""
