"""Tables and figures, written as Markdown and HTML."""
