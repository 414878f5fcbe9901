"""How much do interpolation, padding and alignment on the token lattice matter?"""
