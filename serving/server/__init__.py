"""`perceptiondlm serve`: captions and answers over HTTP, on the batching engine."""
