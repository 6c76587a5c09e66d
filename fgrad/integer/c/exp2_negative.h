/* 2**(-t / 2**16) in units of 2**-22. */
static int32_t fgrad_exp2_negative(int32_t t) {
  const int32_t whole = t >> 16, place = (t & 0xffff) >> 8, rest = t & 0xff;
  const int32_t here = fgrad_powers[place], there = fgrad_powers[place + 1];
  const int32_t power = here + (((there - here) * rest + 128) >> 8);
  return whole > 0 ? (power + (int32_t)(1u << (whole - 1))) >> whole : power;
}
