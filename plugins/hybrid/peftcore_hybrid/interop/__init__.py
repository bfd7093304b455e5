"""How files of other libraries keep the methods of this plugin: one module for each library and family of methods."""
