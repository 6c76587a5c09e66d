/* 2**(-t / 2**16) in units of 2**-15, by a polynomial. */
static int32_t fgrad_exp2_short(int32_t t) {
  const int32_t whole = t >> 16, f = (t & 0xffff) - 0x8000;
  int32_t power = -41430 + ((28682 * f) >> 18);
  power = 44528 + ((power * f) >> 18);
  power = -32120 + ((power * f + 0x20000) >> 18);
  power = 92682 + ((power * f + 0x4000) >> 15);
  return (power + (int32_t)(2u << whole)) >> (whole + 2);
}
