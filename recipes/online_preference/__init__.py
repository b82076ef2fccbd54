"""Responses are drawn, compared and learned from as preferences; self-play and games are among them."""
