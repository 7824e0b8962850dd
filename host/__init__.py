"""The other end of the wire, for people who have no ChromeOS or Fuchsia."""
