// Element types that kernels take. The numbers are part of the raw (NumPy) interface of fastdiff._C.
#pragma once
#include <cstdint>

namespace fastdiff {

enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,  // CPU only: the scalar kernel, instantiated for gradient checks
};

inline int64_t dtype_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

}  // namespace fastdiff
