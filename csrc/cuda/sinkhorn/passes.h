// The launches that a pass is made of.
#pragma once
#include "launches.h"

namespace fastcl::cuda {

void sinkhorn_whole_rows(const Where &where, const SinkhornPassCall &call);
void sinkhorn_long_rows(const Where &where, const SinkhornPassCall &call); // what rows reduce to
void sinkhorn_columns(const Where &where, const SinkhornPassCall &call);   // what columns do, and the assignments
void sinkhorn_score_gradient(const Where &where, const SinkhornPassCall &call);

} // namespace fastcl::cuda
