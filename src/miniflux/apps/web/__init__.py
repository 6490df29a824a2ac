"""What the page and the server share."""
