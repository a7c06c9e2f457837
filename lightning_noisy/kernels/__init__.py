"""Fast implementations and the random numbers, each tested against a reference; imports no feature code."""
