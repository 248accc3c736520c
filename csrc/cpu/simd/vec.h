// SPDX-License-Identifier: Apache-2.0
// Vec<float> and Vec<double>: the numbers of one register. Compiled once per instruction set by for_each_isa.h, so it
// has no include guard and includes nothing.
//
// A comparison gives a Mask, one bit a lane, lane 0 lowest. A comparison with NaN is false.

using Mask = uint32_t;

/// The bits of a float8_e4m3fn, moved to their places in a float32, make this many times the value, but a number for
/// NaN.
constexpr float kTinyFloat8 = 0x1p-120F;

/// Any machine, and float64 everywhere: the compiler's own vectors, as wide as the instruction set's registers.
template <typename T>
struct Vec {
#if defined(ZEXPERT_ISA_AVX512)
  static constexpr size_t kBytes = 64;
#elif defined(ZEXPERT_ISA_AVX2)
  static constexpr size_t kBytes = 32;
#else
  static constexpr size_t kBytes = 16;
#endif
  using Bit = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T Lanes __attribute__((vector_size(kBytes)));
  typedef Bit Bits __attribute__((vector_size(kBytes)));

  static constexpr int64_t kWidth = static_cast<int64_t>(kBytes / sizeof(T));
  Lanes lanes;

  static ZEXPERT_INLINE Vec broadcast(T value) { return {value - Lanes{}}; }
  static ZEXPERT_INLINE Vec zero() { return {Lanes{}}; }
  template <typename From>
  static ZEXPERT_INLINE Vec load(const From* source) {
    Vec result;
    if constexpr (std::is_same_v<From, T>) {
      std::memcpy(&result.lanes, source, kBytes);
    } else {
      for (int64_t i = 0; i < kWidth; ++i) result.lanes[i] = static_cast<T>(source[i]);
    }
    return result;
  }
  /// kTinyFloat8 times the values.
  static ZEXPERT_INLINE Vec load_tiny(const Float8E4M3* source) {
    Bits word;
    for (int64_t i = 0; i < kWidth; ++i) word[i] = static_cast<int8_t>(source[i].bits);
    return {reinterpret_cast<Lanes>((word << 20) & static_cast<Bit>(0x87f00000))};
  }
  /// The first `count` lanes from memory, `fill` in the others. Reads nothing past them.
  template <typename From>
  static ZEXPERT_INLINE Vec load_partial(const From* source, int64_t count, T fill) {
    T buffer[static_cast<size_t>(kWidth)];
    for (int64_t i = 0; i < kWidth; ++i) buffer[i] = i < count ? static_cast<T>(source[i]) : fill;
    return load(buffer);
  }
  template <typename To>
  ZEXPERT_INLINE void store(To* target) const {
    if constexpr (std::is_same_v<To, T>) {
      std::memcpy(target, &lanes, kBytes);
    } else {
      for (int64_t i = 0; i < kWidth; ++i) target[i] = static_cast<To>(lanes[i]);
    }
  }
  template <typename To>
  ZEXPERT_INLINE void store_partial(To* target, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) target[i] = static_cast<To>(lanes[i]);
  }

  friend ZEXPERT_INLINE Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
  friend ZEXPERT_INLINE Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
  friend ZEXPERT_INLINE Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
  friend ZEXPERT_INLINE Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
  /// a * b + c, rounded once where the instruction set has it.
  static ZEXPERT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }
  /// The larger of a and b; b where a is NaN.
  static ZEXPERT_INLINE Vec max(Vec a, Vec b) { return {a.lanes > b.lanes ? a.lanes : b.lanes}; }
  /// The smaller of a and b; b where a is NaN.
  static ZEXPERT_INLINE Vec min(Vec a, Vec b) { return {a.lanes < b.lanes ? a.lanes : b.lanes}; }
  static ZEXPERT_INLINE Vec sqrt(Vec a) {
    for (int64_t i = 0; i < kWidth; ++i) a.lanes[i] = std::sqrt(a.lanes[i]);
    return a;
  }
  static ZEXPERT_INLINE Vec abs(Vec a) {
    return {reinterpret_cast<Lanes>(reinterpret_cast<Bits>(a.lanes) & std::numeric_limits<Bit>::max())};
  }
  /// A comparison's result, all ones in the lanes where it holds, as a Mask.
  static ZEXPERT_INLINE Mask as_mask(Bits holds) {
#if defined(ZEXPERT_ISA_AVX512)
    return _mm512_movepi64_mask(reinterpret_cast<__m512i>(holds));
#elif defined(ZEXPERT_ISA_AVX2)
    return static_cast<Mask>(_mm256_movemask_pd(reinterpret_cast<__m256d>(holds)));
#else
#if defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
      return static_cast<Mask>(_mm_movemask_ps(reinterpret_cast<__m128>(holds)));
    }
#endif
    Mask mask = 0;
    for (int64_t i = 0; i < kWidth; ++i) mask |= (static_cast<Mask>(holds[i]) & 1U) << i;
    return mask;
#endif
  }
  static ZEXPERT_INLINE Mask greater_equal(Vec a, Vec b) { return as_mask(a.lanes >= b.lanes); }
  static ZEXPERT_INLINE Mask greater(Vec a, Vec b) { return as_mask(a.lanes > b.lanes); }
  /// Lanes that are neither NaN nor infinite.
  /// `a` where the mask's bit is set, else `b`.
  static ZEXPERT_INLINE Vec select(Mask mask, Vec a, Vec b) {
    Bits lane_bit;
    for (int64_t i = 0; i < kWidth; ++i) lane_bit[i] = Bit{1} << i;
    return {((lane_bit & static_cast<Bit>(mask)) == lane_bit) ? a.lanes : b.lanes};
  }
  ZEXPERT_INLINE T sum() const {
    T total = lanes[0];
    for (int64_t i = 1; i < kWidth; ++i) total += lanes[i];
    return total;
  }
  /// target[0..3] = the sums of a, b, c and d, each added up in one order whatever its place among the four.
  static ZEXPERT_INLINE void sums(Vec a, Vec b, Vec c, Vec d, T* target) {
    target[0] = a.sum();
    target[1] = b.sum();
    target[2] = c.sum();
    target[3] = d.sum();
  }
  ZEXPERT_INLINE T largest() const {
    T result = lanes[0];
    for (int64_t i = 1; i < kWidth; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
  }
};

#if defined(ZEXPERT_ISA_AVX512)

template <>
struct Vec<float> {
  static constexpr int64_t kWidth = 16;
  __m512 lanes;

  static ZEXPERT_INLINE Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static ZEXPERT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static ZEXPERT_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1U << count) - 1U); }
  static ZEXPERT_INLINE Vec widen(__m256i bfloat16_bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16_bits), 16))};
  }

  static ZEXPERT_INLINE Vec load(const float* source) { return {_mm512_loadu_ps(source)}; }
  static ZEXPERT_INLINE Vec load(const BFloat16* source) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  static ZEXPERT_INLINE Vec load(const Half* source) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
  }
  static ZEXPERT_INLINE Vec load(const Float8E4M3* source) {
    // In their places in a float16 the bits make a value that is 2^8 times smaller.
    const __m256i word = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(word, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m256i magnitude = _mm256_and_si256(half, _mm256_set1_epi16(0x3f80));
    const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
    return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, is_nan)), _mm512_set1_ps(256.0F))};
  }
  static ZEXPERT_INLINE Vec load_tiny(const Float8E4M3* source) {
    const __m512i word = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x87f00000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(word, 20), mask))};
  }
  static ZEXPERT_INLINE Vec load_partial(const float* source, int64_t count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), source)};
  }
  static ZEXPERT_INLINE Vec load_partial(const BFloat16* source, int64_t count, float fill) {
    return select(first(count), widen(_mm256_maskz_loadu_epi16(first(count), source)), broadcast(fill));
  }
  static ZEXPERT_INLINE Vec load_partial(const Float8E4M3* source, int64_t count, float fill) {
    float buffer[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) buffer[i] = i < count ? static_cast<float>(source[i]) : fill;
    return load(buffer);
  }
  static ZEXPERT_INLINE Vec load_partial(const Half* source, int64_t count, float fill) {
    return select(first(count), {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), source))}, broadcast(fill));
  }

  ZEXPERT_INLINE __m256i as_bfloat16() const {
    const __m512i word = _mm512_castps_si512(lanes);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
  }
  ZEXPERT_INLINE __m256i as_half() const { return _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT); }
  ZEXPERT_INLINE void store(float* target) const { _mm512_storeu_ps(target, lanes); }
  ZEXPERT_INLINE void store(BFloat16* target) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), as_bfloat16());
  }
  ZEXPERT_INLINE void store(Half* target) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), as_half()); }
  ZEXPERT_INLINE void store_partial(float* target, int64_t count) const {
    _mm512_mask_storeu_ps(target, first(count), lanes);
  }
  ZEXPERT_INLINE void store_partial(BFloat16* target, int64_t count) const {
    _mm256_mask_storeu_epi16(target, first(count), as_bfloat16());
  }
  ZEXPERT_INLINE void store_partial(Half* target, int64_t count) const {
    _mm256_mask_storeu_epi16(target, first(count), as_half());
  }

  friend ZEXPERT_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static ZEXPERT_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.lanes)}; }
  static ZEXPERT_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.lanes)}; }
  static ZEXPERT_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_GE_OQ); }
  static ZEXPERT_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_GT_OQ); }
  static ZEXPERT_INLINE Vec select(Mask mask, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.lanes, static_cast<__mmask16>(mask), a.lanes)};
  }
  ZEXPERT_INLINE float sum() const { return _mm512_reduce_add_ps(lanes); }
  static ZEXPERT_INLINE void sums(Vec a, Vec b, Vec c, Vec d, float* target) {
    // Within each 128 bits: neighbours of a and b, of c and d, then the four partial sums side by side.
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.lanes, b.lanes), _mm512_unpackhi_ps(a.lanes, b.lanes));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.lanes, d.lanes), _mm512_unpackhi_ps(c.lanes, d.lanes));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                      _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(target, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  ZEXPERT_INLINE float largest() const { return _mm512_reduce_max_ps(lanes); }
};

#elif defined(ZEXPERT_ISA_AVX2)

template <>
struct Vec<float> {
  static constexpr int64_t kWidth = 8;
  __m256 lanes;

  static ZEXPERT_INLINE Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static ZEXPERT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static ZEXPERT_INLINE Vec widen(__m128i bfloat16_bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16_bits), 16))};
  }

  static ZEXPERT_INLINE Vec load(const float* source) { return {_mm256_loadu_ps(source)}; }
  static ZEXPERT_INLINE Vec load(const BFloat16* source) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  static ZEXPERT_INLINE Vec load(const Half* source) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
  }
  static ZEXPERT_INLINE Vec load(const Float8E4M3* source) {
    // In their places in a float16 the bits make a value that is 2^8 times smaller.
    const __m128i word = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(word, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi16(0x3f80));
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x3f80));
    return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, is_nan)), _mm256_set1_ps(256.0F))};
  }
  static ZEXPERT_INLINE Vec load_tiny(const Float8E4M3* source) {
    const __m256i word = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0x87f00000));
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(word, 20), mask))};
  }
  template <typename From>
  static ZEXPERT_INLINE Vec load_partial(const From* source, int64_t count, float fill) {
    float buffer[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) buffer[i] = i < count ? static_cast<float>(source[i]) : fill;
    return load(buffer);
  }

  ZEXPERT_INLINE void store(float* target) const { _mm256_storeu_ps(target, lanes); }
  ZEXPERT_INLINE void store(BFloat16* target) const {
    const __m256i word = _mm256_castps_si256(lanes);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), packed);
  }
  ZEXPERT_INLINE void store(Half* target) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
  }
  template <typename To>
  ZEXPERT_INLINE void store_partial(To* target, int64_t count) const {
    To buffer[kWidth];
    store(buffer);
    for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
  }

  friend ZEXPERT_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
  friend ZEXPERT_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
  static ZEXPERT_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lanes, b.lanes)}; }
  static ZEXPERT_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lanes)}; }
  static ZEXPERT_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0F), a.lanes)}; }
  static ZEXPERT_INLINE Mask bits(__m256 comparison) { return static_cast<Mask>(_mm256_movemask_ps(comparison)); }
  static ZEXPERT_INLINE Mask greater_equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_GE_OQ)); }
  static ZEXPERT_INLINE Mask greater(Vec a, Vec b) { return bits(_mm256_cmp_ps(a.lanes, b.lanes, _CMP_GT_OQ)); }
  static ZEXPERT_INLINE Vec select(Mask mask, Vec a, Vec b) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), lane_bit);
    return {_mm256_blendv_ps(b.lanes, a.lanes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)))};
  }
  ZEXPERT_INLINE float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static ZEXPERT_INLINE void sums(Vec a, Vec b, Vec c, Vec d, float* target) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.lanes, b.lanes), _mm256_hadd_ps(c.lanes, d.lanes));
    _mm_storeu_ps(target, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  ZEXPERT_INLINE float largest() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
};

#endif

/// exp(x), within 2 units in the last place. exp(-inf) = 0, exp(NaN) = NaN, and results keep their subnormal bits.
ZEXPERT_INLINE Vec<double> exp(Vec<double> x) {
  for (int64_t i = 0; i < Vec<double>::kWidth; ++i) x.lanes[i] = std::exp(x.lanes[i]);
  return x;
}
ZEXPERT_INLINE Vec<double> exp_up_to_130(Vec<double> x) { return exp(x); }

/// x * 2^n for an integral n within [-300, 300].
ZEXPERT_INLINE Vec<float> scale_by_power_of_two(Vec<float> x, Vec<float> n) {
#if defined(ZEXPERT_ISA_AVX512)
  return {_mm512_scalef_ps(x.lanes, n.lanes)};
#elif defined(ZEXPERT_ISA_AVX2)
  // Two factors, so that results below 2^-126 and up to 2^128 are reached without leaving the exponent's range.
  const __m256i exponent = _mm256_cvtps_epi32(n.lanes);
  const __m256i first = _mm256_srai_epi32(exponent, 1);
  const __m256i second = _mm256_sub_epi32(exponent, first);
  const __m256i one = _mm256_set1_epi32(127);
  const Vec<float> first_factor{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, one), 23))};
  const Vec<float> second_factor{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, one), 23))};
  return (x * first_factor) * second_factor;
#else
  using Lanes = Vec<float>::Lanes;
  using Bits = Vec<float>::Bits;
  const Lanes ones = Vec<float>::broadcast(12582912.0F).lanes;  // 1.5 * 2^23, where a float's last bit counts ones
  const Bits exponent = reinterpret_cast<Bits>(n.lanes + ones) - reinterpret_cast<Bits>(ones);
  const Bits first = exponent >> 1;
  const Bits second = exponent - first;
  const Vec<float> first_factor{reinterpret_cast<Lanes>((first + 127) << 23)};
  const Vec<float> second_factor{reinterpret_cast<Lanes>((second + 127) << 23)};
  return (x * first_factor) * second_factor;
#endif
}

/// exp(x) for x up to 130.
ZEXPERT_INLINE Vec<float> exp_up_to_130(Vec<float> x) {
  using V = Vec<float>;
  // exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; ln 2 in two parts keeps r exact. Below -150 the
  // result is 0. The clamp is written this way round to let NaN through.
  x = V::max(V::broadcast(-150.0F), x);
  // At 1.5 * 2^23 a float counts in ones: the sum rounds to an integer.
  const V shift = V::broadcast(12582912.0F);
  const V n = V::multiply_add(x, V::broadcast(1.44269504088896341F), shift) - shift;
  V r = V::multiply_add(n, V::broadcast(-0.693145751953125F), x);
  r = V::multiply_add(n, V::broadcast(-1.42860682030941723212e-6F), r);
  // Minimax in relative error: 4e-9 off before rounding.
  V p = V::broadcast(0x1.6a23dp-10F);
  p = V::multiply_add(p, r, V::broadcast(0x1.123a2p-7F));
  p = V::multiply_add(p, r, V::broadcast(0x1.5558f2p-5F));
  p = V::multiply_add(p, r, V::broadcast(0x1.555492p-3F));
  p = V::multiply_add(p, r, V::broadcast(0x1.fffffcp-2F));
  p = V::multiply_add(p, r, V::broadcast(1.0F));
  p = V::multiply_add(p, r, V::broadcast(1.0F));
  return scale_by_power_of_two(p, n);
}
ZEXPERT_INLINE Vec<float> exp(Vec<float> x) { return exp_up_to_130(Vec<float>::min(Vec<float>::broadcast(130.0F), x)); }

/// 1 / (1 + exp(-x)).
template <typename T>
ZEXPERT_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> one = Vec<T>::broadcast(T(1));
  return one / (one + exp(Vec<T>::zero() - x));
}

/// x / (1 + exp(-x)): PyTorch's formula, so NaN for -inf.
template <typename T>
ZEXPERT_INLINE Vec<T> silu(Vec<T> x) {
  return x / (Vec<T>::broadcast(T(1)) + exp(Vec<T>::zero() - x));
}

/// x, rounded here: without this, compilers may fuse a product into the sum that uses it.
template <typename T>
ZEXPERT_INLINE Vec<T> unfused(Vec<T> x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x.lanes));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x.lanes));
#else
  __asm__("" : "+m"(x.lanes));
#endif
  return x;
}

/// log(1 + x) for x within [0, 1], within 2 units in the last place.
ZEXPERT_INLINE Vec<float> log1p_of_fraction(Vec<float> x) {
  // log(1 + x) = 2 atanh(s), s = x / (2 + x) <= 1/3; the series in s^2 ends below half a unit in the last place.
  using V = Vec<float>;
  const V s = x / (V::broadcast(2.0F) + x);
  const V square = s * s;
  V p = V::broadcast(2.0F / 15.0F);
  p = V::multiply_add(p, square, V::broadcast(2.0F / 13.0F));
  p = V::multiply_add(p, square, V::broadcast(2.0F / 11.0F));
  p = V::multiply_add(p, square, V::broadcast(2.0F / 9.0F));
  p = V::multiply_add(p, square, V::broadcast(2.0F / 7.0F));
  p = V::multiply_add(p, square, V::broadcast(2.0F / 5.0F));
  p = V::multiply_add(p, square, V::broadcast(2.0F / 3.0F));
  const V twice = s + s;
  return V::multiply_add(p * square, s, twice);
}
ZEXPERT_INLINE Vec<double> log1p_of_fraction(Vec<double> x) {
  for (int64_t i = 0; i < Vec<double>::kWidth; ++i) x.lanes[i] = std::log1p(x.lanes[i]);
  return x;
}

/// log(1 + exp(x)), for any x.
template <typename T>
ZEXPERT_INLINE Vec<T> softplus(Vec<T> x) {
  using V = Vec<T>;
  return V::max(x, V::zero()) + log1p_of_fraction(exp(V::zero() - V::abs(x)));
}
