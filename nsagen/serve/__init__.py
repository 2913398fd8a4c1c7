"""`nsagen serve`: an endpoint with OpenAI's interface over `ContinuousBatch`."""
