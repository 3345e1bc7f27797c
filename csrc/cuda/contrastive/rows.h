// What the sweeps over sorted rows share, of the contrastive statistics and of the pair sums.
#pragma once
#include "launches.h"
#include "sweep.h"

namespace fastcl::cuda {

// Launches the kernel that fills in the arranged rows of both sets.
void arrange(const Contrast &p, const Where &where);
// Describes a sweep of one set's rows over the other's. scale: the index of the logit scale.
void describe(Sweep &sweep, const Contrast &p, const RowSet &rows, const RowSet &columns, int scale);
// Launches the kernel that brings a gradient [n, width] through the normalisation, to the caller's order and to a dtype.
void finish(const Contrast &p, const RowSet &rows, const float *gradient, const float *norms, void *out, Dtype dtype, const Where &where);

} // namespace fastcl::cuda
