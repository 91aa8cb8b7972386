export default 'Press + to count.';
