"""The doors people reach for: prompts to regions, annotation, server, app, video, answers per attribute."""
