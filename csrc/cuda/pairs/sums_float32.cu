#define FASTCL_SWEEPS float
#include "sweeps.h"
