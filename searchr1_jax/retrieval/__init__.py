"""Search engines behind one protocol: text in, passages out."""
