"""The HTTP server: pictures for programs that speak BFL's or OpenAI's shape. Needs the extra `serve`."""
