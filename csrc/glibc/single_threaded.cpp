// The standard library's headers read this variable of glibc 2.32. 0 means that there may be several threads.
extern "C" {
char __libc_single_threaded = 0;
}
