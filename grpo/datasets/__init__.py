"""Data: file formats, chat templates, mixtures."""
