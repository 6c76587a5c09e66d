/* q * m / 2**s, rounded to nearest; the product is proven to fit. */
static inline int32_t fgrad_multiply_shift(int32_t q, int32_t m, int32_t s) {
  return (q * m + (int32_t)(1u << (s - 1))) >> s;
}
