"""Files: what is read from disk is checked before it is used; what is written appears whole or not at all."""
