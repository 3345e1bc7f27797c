#define FASTCL_ISA baseline
#define FASTCL_BYTES 16
#define FASTCL_ROWS 6
#define FASTCL_DOT 0
#include "engine_body.h"
