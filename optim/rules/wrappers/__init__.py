"""Rules around other rules: states in 8 bits (`quantized`), and states of a low-rank gradient (`low_rank`)."""
