"""From a trained network to answers, and what they are worth."""
