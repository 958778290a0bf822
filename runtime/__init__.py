"""One Session over every artifact: prefill, decode, generate, bench."""
