"""Jobs of the commands that work on adapter files: merge, convert, export-lora."""
