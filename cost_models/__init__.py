"""Hardware to seconds: what a piece of work or a collective takes. Knows neither autopar nor torch."""
