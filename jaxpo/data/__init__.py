"""Data: sources and formats, chat templates and tokenisation, packing, the loader."""
