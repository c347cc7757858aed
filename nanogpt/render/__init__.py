"""Renderers for the terminal and for HTML pages."""
