"""Constants. Everything inside the library is SI; ms, GB and percent appear only in what people read."""

MS = 1e-3
US = 1e-6
NS = 1e-9
PJ = 1e-12

KIB = 1024
MIB = 1024**2
GIB = 1024**3
GB = 1e9
TERA = 1e12

FP16_BYTES = 2
BITS_PER_BYTE = 8
