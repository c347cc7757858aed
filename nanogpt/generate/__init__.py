"""Text generation: sequences, sampling, decoders and the continuous-batching engine."""
