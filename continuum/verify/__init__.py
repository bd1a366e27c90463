"""What `continuum verify` certifies: networks are their plain loops to the bit, schemes have their orders, steps are undone."""

from continuum.verify.accuracy import scheme_orders, undo_errors
from continuum.verify.certificate import Certificate, certify

__all__ = ["Certificate", "certify", "scheme_orders", "undo_errors"]
