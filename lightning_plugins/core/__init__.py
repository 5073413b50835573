"""What the techniques share; each module answers one question."""
