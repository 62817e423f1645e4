"""Commands that do more than run passes: init, try, status, serve, demo."""
