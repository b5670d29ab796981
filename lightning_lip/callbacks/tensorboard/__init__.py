"""Figures and the HPARAMS tab."""
