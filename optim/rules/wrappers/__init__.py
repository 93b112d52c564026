"""Rules around other rules: 8-bit states (`quantized`), and states of a low-rank gradient (`low_rank`)."""
