"""OpenAI over HTTP: bodies in, answers out, connections kept in bounds."""
