"""A trained network in a user's hands: adapted to samples of their own, asked, kept and exported."""
