"""Constants. Everything inside the library is SI; ms, GB and percent appear only in what people read."""

MS = 1e-3
GIB = 1024**3
GB = 1e9
TERA = 1e12

FP8_BYTES = 1
FP16_BYTES = 2
