// SPDX-License-Identifier: Apache-2.0
// The scoring functions: for each one, the score of a logit on both devices and the derivative of the score.
//
// To add one, add a line to ZEXPERT_SCORING_FUNCS (zexpert/enums.h) and a struct here. Without the struct, or with a
// struct that lacks a function, neither the CPU kernels nor the CUDA kernels compile. Scores must not be negative. On
// the CPU the score of NaN must be NaN: NaN marks a masked expert. V::max returns its second argument for NaN.
//
// This file includes nothing. The CPU kernels include it inside the namespace of an instruction set, where Vec is that
// set's vector (vec.h); the CUDA kernels include it inside zexpert::cuda.

#ifdef __CUDACC__
#define ZEXPERT_SLOPE __host__ __device__ __forceinline__
#define ZEXPERT_VISIT __device__ __forceinline__
#else
#define ZEXPERT_SLOPE ZEXPERT_INLINE
#define ZEXPERT_VISIT inline
#endif

/// A struct per scoring function. Softmax has term(logit, largest): a score is an expert's term divided by the sum of
/// the row's terms. Every other function has score(logit), and slope(score) = d score / d logit.
template <ScoringFunc scoring_func>
struct Scoring;

template <>
struct Scoring<ScoringFunc::kSoftmax> {
  static constexpr bool kIsSoftmax = true;

  /// exp(logit - largest).
#ifdef __CUDACC__
  /// The careful form is right for every logit, to within a unit in the last place. The other form is fast and right
  /// for logits of ordinary size; the rounding of largest * log2(e) gives all terms of a row the same factor.
  template <bool kCareful>
  static __device__ __forceinline__ float term(float logit, float largest) {
    constexpr float kLog2E = 1.44269504088896341F;
    if (kCareful)
      return expf(__fadd_rn(logit, -largest));
    return exp2_approx(__fmaf_rn(logit, kLog2E, __fmul_rn(largest, -kLog2E)));
  }
#else
  template <typename V>
  static ZEXPERT_INLINE V term(V logit, V largest) {
    return exp_up_to_130(logit - largest);
  }
#endif
};

template <>
struct Scoring<ScoringFunc::kSigmoid> {
  static constexpr bool kIsSoftmax = false;

  /// 1 / (1 + exp(-logit)).
#ifdef __CUDACC__
  static __device__ __forceinline__ float score(float logit) { return __fdividef(1.0F, __fadd_rn(1.0F, expf(-logit))); }
#else
  template <typename V>
  static ZEXPERT_INLINE V score(V logit) {
    return sigmoid(logit);
  }
#endif

  template <typename T>
  static ZEXPERT_SLOPE T slope(T score) {
    return score * (T(1) - score);
  }
};

template <>
struct Scoring<ScoringFunc::kSqrtSoftplus> {
  static constexpr bool kIsSoftmax = false;

  /// sqrt(log(1 + exp(logit))), stable at both ends.
#ifdef __CUDACC__
  static __device__ __forceinline__ float score(float logit) {
    const float softplus = __fadd_rn(fmaxf(logit, 0.0F), log1pf(expf(-fabsf(logit))));
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(softplus));
    // Far below 0 the softplus is exp(logit) to within rounding, but underflows long before its root does.
    constexpr float kExponential = -17.0F;
    return logit < kExponential ? expf(0.5F * logit) : root;
  }
#else
  template <typename V>
  static ZEXPERT_INLINE V score(V logit) {
    return V::sqrt(softplus(logit));
  }
#endif

  /// sigmoid(logit) / (2 * score), where sigmoid(logit) = 1 - exp(-score^2) because score^2 = softplus(logit). The
  /// slope goes to 0 with the score.
  template <typename T>
  static ZEXPERT_SLOPE T slope(T score) {
    return score > T(0) ? -std::expm1(-score * score) / (T(2) * score) : T(0);
  }
};

/// Calls `fn` with the Scoring struct of `scoring_func`, which RoutingSpec::validate has checked.
template <typename Fn>
ZEXPERT_VISIT auto visit_scoring_func(ScoringFunc scoring_func, Fn&& fn) {
#define ZEXPERT_SCORING_CASE(enumerator, python_name, text) \
  case ScoringFunc::enumerator: return fn(Scoring<ScoringFunc::enumerator>{});
  switch (scoring_func) { ZEXPERT_SCORING_FUNCS(ZEXPERT_SCORING_CASE) }
#undef ZEXPERT_SCORING_CASE
  __builtin_unreachable();
}

#undef ZEXPERT_SLOPE
#undef ZEXPERT_VISIT
