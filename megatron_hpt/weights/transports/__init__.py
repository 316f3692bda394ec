"""How the bytes travel. The manifest above them is the same for every transport."""
