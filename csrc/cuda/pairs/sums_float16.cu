#define FASTCL_SWEEPS fastcl::cuda::Half
#include "sweeps.h"
