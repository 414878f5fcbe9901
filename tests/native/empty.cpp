// What a sanitizer is tried with.
int main() {}
