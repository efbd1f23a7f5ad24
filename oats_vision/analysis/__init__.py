"""What is drawn of compressed models: pages, tables, figures."""
