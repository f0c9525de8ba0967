"""Figures, pages and tables for people."""
