#define FASTCL_SWEEPS fastcl::cuda::Bfloat16
#include "sweeps.h"
