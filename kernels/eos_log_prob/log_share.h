// From the two sums to the logarithm of the share, for host and device alike.
#pragma once
#include <math.h>

#include "kernels/common/host_device.h"

namespace fastdiff {

// log(E / (E + O)) with E = end_sum · exp(end_max) and O alike: what log(O / E) says of it, with all digits where the
// share is near one (-O / E) and where it is near zero. A sum of 0 comes with a maximum of -inf.
FD_HOST_DEVICE float log_share(double end_max, double end_sum, double other_max, double other_sum) {
  const double odds = (other_max - end_max) + (::log(other_sum) - ::log(end_sum));
  const double loss = odds > 0 ? odds + ::log1p(::exp(-odds)) : ::log1p(::exp(odds));  // NaN stays
  return static_cast<float>(0.0 - loss);
}

}  // namespace fastdiff
