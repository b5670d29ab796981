"""Training for certified accuracy, with this package and with its peers, tuned alike: lightning-lip scoreboard."""
