// The launches of which a pass consists.
#pragma once
#include "launches.h"

namespace fastcl::cuda {

void sinkhorn_whole_rows(const Where &where, const SinkhornPassCall &call);
void sinkhorn_long_rows(const Where &where, const SinkhornPassCall &call); // the sums over rows
void sinkhorn_columns(const Where &where, const SinkhornPassCall &call);   // the column sums, and the assignments
void sinkhorn_score_gradient(const Where &where, const SinkhornPassCall &call);

} // namespace fastcl::cuda
