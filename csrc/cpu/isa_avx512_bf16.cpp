#define FASTCL_ISA avx512_bf16
#define FASTCL_BYTES 64
#define FASTCL_ROWS 12
#define FASTCL_DOT 1
#include "engine_body.h"
