"""Charge, reserve, ship: the carrier fails after the card was charged, and the card is not charged again."""
