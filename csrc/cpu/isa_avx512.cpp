#define FASTCL_ISA avx512
#define FASTCL_BYTES 64
#define FASTCL_ROWS 12
#define FASTCL_DOT 0
#include "engine_body.h"
